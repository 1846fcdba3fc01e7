"""How much faster than tensor parallelism the best layouts generate, predicted beside what HAP's authors report."""
