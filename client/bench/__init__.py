"""The benchmark behind `outrider bench` and `outrider demo`: what is run, in which order, and what is made of it."""
