"""Noise schedules and samplers: they fill tables in float64, and one kernel runs them."""
