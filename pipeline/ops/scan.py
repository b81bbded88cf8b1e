"""The selective scan: one signature, in plain torch."""
