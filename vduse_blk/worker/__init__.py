"""The process that serves one disk: one stack, its export, the control socket."""
