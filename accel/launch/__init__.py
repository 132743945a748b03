"""A config becomes running workers, on one machine.

    accel launch ──► start ──► agent ──► worker, worker, ...
    (no torch)       waits     warm      the user's script as __main__

`start` runs in the launcher's process and starts the `agent` with the right environment. The agent imports torch,
listens at the `rendezvous`, makes the workers and waits for them. A `worker` runs the user's command and tells of
its failure (`failures`). Killed at any point and in any way, no process of a run outlives it (`signals`).
"""
