"""Does sharpening help? Tasks, controls, ablations and the statistics to tell."""
