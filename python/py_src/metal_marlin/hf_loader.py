"""`python -m metal_marlin.hf_loader MODEL OUT --bits 4`: quantises a Hugging Face model.

The same as `python -m metal_marlin quantize`, whose options it takes: `--bits`, `--format`, `--group-size`, `--method` and so on.
"""

import sys

from metal_marlin.__main__ import main

if __name__ == "__main__":
    sys.exit(main("quantize"))
