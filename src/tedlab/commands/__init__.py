"""The commands of ``tedlab COMMAND``. Each is one module, which reads arguments and calls the library."""
