"""`python .ci/installed.py FOLDER ...`: `python -m gft_kernels ...` of what lies in FOLDER, the checkout left out.

An editable install's finder would lend the compiled module of the checkout.
"""

import os
import runpy
import sys

folder = sys.argv.pop(1)
os.chdir(folder)
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[0] = os.getcwd()
runpy.run_module("gft_kernels", run_name="__main__", alter_sys=True)
