"""Papers: what each claims, and the runs that check it. One file per paper that runs; the others are listed as planned."""
