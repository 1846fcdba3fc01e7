"""Makes ``python -m tedlab.train …`` the same as ``tedlab train …``, also under torchrun and srun."""

from tedlab.commands.train import main

if __name__ == "__main__":
    main()
