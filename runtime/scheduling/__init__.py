"""Which sequence runs when: the scheduler, reuse of prefixes, snapshots and speculation, without threads or sockets."""
