"""One run on a real cluster, from its submission to a resume on another number of nodes: the short form."""
