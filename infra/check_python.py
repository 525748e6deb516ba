"""Say clearly when the Python that would make the virtual environment is too old."""

import sys

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d found, 3.10 or newer needed; run `make PYTHON=python3.11 …`" % sys.version_info[:2])
