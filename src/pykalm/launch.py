"""What a launcher (`accelerate launch`, torchrun) says in the environment; nothing is loaded for it."""

import os


def num_launched() -> int:
    """Return how many processes work on this command, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def launched_rank() -> int:
    """Return the number of this process among all of them; 0 is the main one."""
    return int(os.environ["RANK"]) if num_launched() > 1 else 0


def launched_local_rank() -> int:
    """Return the number of this process on its machine: the GPU that it takes."""
    return int(os.environ.get("LOCAL_RANK", "0")) if num_launched() > 1 else 0


def is_asked_for(what: str) -> bool:
    """Return whether `accelerate launch` was given --use_fsdp, --use_deepspeed or --use_megatron_lm."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() in ("true", "1")
