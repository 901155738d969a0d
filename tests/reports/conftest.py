import pytest
from compared import decay, write_run


@pytest.fixture
def arms(tmp_path):
    """A baseline, an arm twice as fast at 5 inference steps and harmful at 20, and a copy of the baseline; three seeds each."""
    made = {"baseline": [], "coupled": [], "copy": []}
    for seed, scale in enumerate((0.9, 1.0, 1.15)):
        plain = {5: decay(scale=scale), 20: decay(scale=scale / 2)}
        coupled = {5: decay(scale=scale, speed=2), 20: decay(scale=scale / 2, speed=0.8)}
        made["baseline"].append(write_run(tmp_path / f"baseline-seed{seed}", plain, seed=seed))
        made["coupled"].append(
            write_run(tmp_path / f"coupled-seed{seed}", coupled, seed=seed, noise_coupling="assignment", seconds_per_step=0.06)
        )
        made["copy"].append(write_run(tmp_path / f"copy-seed{seed}", plain, seed=seed))
    return made
