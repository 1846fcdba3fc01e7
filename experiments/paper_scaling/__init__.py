"""Strong and weak scaling of the paper's models on its two machines, with and without DTD and CAC."""
