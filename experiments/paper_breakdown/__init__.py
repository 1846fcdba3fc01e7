"""Where a step of the 40 B model on 128 V100 goes, and how sure we can be of the paper's 26 %."""
