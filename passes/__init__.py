"""Passes over torch.fx graphs: capture, normalise, insert quantizers, annotate costs, freeze."""

if __name__ != "cgmq_fx.passes":
    raise ImportError("import this package as cgmq_fx.passes, not as a top-level name")
