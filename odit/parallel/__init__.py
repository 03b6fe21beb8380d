"""Where numbers live, and never what they are: mesh, collectives, specs, ZeRO and one file a sequence strategy."""
