"""Says which grid stands where: schemes, presets, configs."""
