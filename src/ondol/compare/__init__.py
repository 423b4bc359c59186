"""Methods beside each other on the same work: arms, seeds, paired differences."""
