collect_ignore_glob = ["*.py"]  # to collect the package is to import it, and that registers its quantizer here
