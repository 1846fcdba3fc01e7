"""The commands of ``tedlab COMMAND``, one module each: what they take, and the library's functions that they call."""
