"""A seeded fuzzer: what no person would give, and what disks and editors do, for every flag, file and folder that the scripts read.

Every case must end within its time in one of two ways: with exit code 1 or 2 and one line that names the flag, the file or the value, the
output folder as it was where nothing was begun; or it runs, and what it leaves is sane: finite losses and weights, a summary, and after
damage to a checkpoint the very weights of the run that nothing happened to, or a line that says what was left out. Otherwise it is a
traceback, a hang, unnamed, touched (the folder) or silent (wrong without a word).

    python -m tests.fuzz --cases 1500 --seed 0            # from the repository's root; prints what failed, exit code 1 if anything did
    python -m tests.fuzz --cases 40 --only checkpoint cache

Kinds (`fuzz.cases.KINDS`): ``flag``, ``pair`` and ``yaml`` read flags in this process, of all six scripts; ``run``, ``data``,
``checkpoint``, ``cache`` and ``samples`` go through whole scripts, in a forked interpreter (tests/launch.py), on tiny networks.

What it does not try: kills, full disks and dead ranks (tests/training); several processes; GPUs and half precision on them; the hub and
any network; pickles with code in them; files that change while a script reads them; pipes, devices and slow or remote file systems; great
sizes that a machine could serve if it had the memory (whole runs keep sizes small); three flags at once; streaming of shards; xformers,
bitsandbytes, wandb and other packages that may not be installed; whether images look right.
"""
