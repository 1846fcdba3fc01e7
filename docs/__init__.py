"""What is exact, modelled and assumed, in Markdown; ``refresh`` writes the figures that the code gives."""
