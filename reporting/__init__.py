"""What bench and experiments share: the machine, tables and figures, runs that are kept, pages made from results; and
what bench and tests read from machine code."""
