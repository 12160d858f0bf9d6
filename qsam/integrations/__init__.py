"""qsam inside training frameworks, one file each: ``trainer`` (Hugging Face Trainer), ``lightning``.

Each file imports its framework at the top, and nothing imports the files; Accelerate needs none (see docs/loops.md).
"""
