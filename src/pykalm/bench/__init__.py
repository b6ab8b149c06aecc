"""How fast it is: kalm measured beside the published recipe and others, in one run on one machine."""
