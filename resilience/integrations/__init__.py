"""Where training runs: adapters to trainers of others. Each imports its library when it is used, and none before."""
