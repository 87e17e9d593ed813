"""`python -m q3vl_mini` and `accelerate launch -m q3vl_mini` are the command `q3vl-mini`."""

import runpy

if __name__ == "__main__":  # processes of a command (processes.py) import this file too
    runpy.run_module("q3vl_mini.cli", run_name="__main__")
