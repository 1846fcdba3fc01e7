"""The paper's 40 B model on today's DGX H100: what its optimisations gain there, and what one would do instead."""
