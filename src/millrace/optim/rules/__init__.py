"""The update rules, one algorithm per file; `millrace.optim.base` is their contract."""
