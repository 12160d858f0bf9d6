"""qsam inside training frameworks, one file each: ``trainer`` (Hugging Face Trainer), ``lightning``.

Each file imports its framework, and qsam imports none of the files. Accelerate needs no file (see docs/loops.md).
"""
