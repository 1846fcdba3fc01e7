"""``tedlab COMMAND …``, or ``python -m tedlab COMMAND …``. Each command is the module of its name in ``commands/``."""

import sys
from importlib import import_module

from tedlab.hints import did_you_mean
from tedlab.interrupts import ended_by_ctrl_c

COMMANDS = {
    "train": "train a model, or a sweep of them",
    "simulate": "predict time, memory and traffic of a step on any cluster",
    "plan": "find the fastest layout that fits on a cluster",
    "calibrate": "measure this machine, for predictions about it",
    "certify": "prove that a configuration equals one process",
    "data": "tokenise a corpus in parallel, or look at its documents",
    "runs": "list runs with their states, losses and where to resume",
    "compare": "put runs side by side",
    "eval": "evaluate a trained model on texts and tasks",
    "generate": "continue a text with a trained model",
    "doctor": "test this machine or allocation, and say what is wrong",
    "models": "list the published models of which there are presets",
    "checkpoint": "inspect a checkpoint, or take models of transformers in and out",
    "completion": "make bash complete commands, presets, values and folders",
}


def main() -> None:
    """Passes the rest of the command line to the command that its first word names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:<12}{what}" for command, what in COMMANDS.items()]
        print("usage: tedlab COMMAND …\n", *lines, "\ntedlab COMMAND --help shows what it takes.", sep="\n")
        return
    if name not in COMMANDS:
        sys.exit(f"tedlab: there is no command '{name}'.{did_you_mean(name, COMMANDS)}\nValid: {', '.join(COMMANDS)}")
    del sys.argv[1]
    with ended_by_ctrl_c():
        import_module(f"tedlab.commands.{name}").main()


if __name__ == "__main__":
    main()
