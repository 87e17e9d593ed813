"""A command for test_processes.py: every process says what the group is, and the second ends with a status."""

import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator


def main(arguments):
    folder, status = arguments
    accelerator = Accelerator(cpu=True)
    ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
    Path(folder, str(accelerator.process_index)).write_text(f"{ranks} {os.environ['OMP_NUM_THREADS']}")
    if status == "wait":
        Path(folder, f"{os.getpid()}.pid").touch()
        time.sleep(600)
    return int(status) if accelerator.process_index else 0
