"""What bench and experiments share: the machine, tables and figures, runs that are kept, pages made from results."""
