"""Makes ``python -m tedlab.train …`` the same as ``tedlab train …``, also under torchrun and srun."""

from tedlab.interrupts import ended_by_ctrl_c

if __name__ == "__main__":
    with ended_by_ctrl_c():
        from tedlab.commands.train import main

        main()
