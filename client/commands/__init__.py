"""The commands of `outrider`. Results go to standard output, progress and complaints to standard error."""
