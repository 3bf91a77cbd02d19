"""`python -m cgmq_fx` is `cgmq-fx`."""

from cgmq_fx.cli import main

main(prog_name="cgmq-fx")
