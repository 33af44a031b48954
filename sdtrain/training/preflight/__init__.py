"""What `sdtrain doctor` checks: one machine, or all ranks of a job before it trains."""
