"""What the README of the study of µP says is what the study gave."""

import json

import experiments.mup.__main__ as study
from experiments.mup.coordinates import slopes

RESULTS = json.loads((study.HERE / "results.json").read_text())
TEXT = (study.HERE / "README.md").read_text()


def test_the_readme_has_the_powers_of_the_width_and_the_best_rates() -> None:
    for form in study.FORMS:
        powers = slopes(study.WIDTHS, RESULTS[form]["moves"], study.STEPS - 1)
        assert f"| {form} | {' | '.join(f'{power:+.2f}' for power in powers.values())} |" in TEXT
        rates = [study.best(row) for row in RESULTS[form]["losses"]]
        assert f"| {form} | {' | '.join(f'{rate:.4f}' for rate in rates)} |" in TEXT


def test_what_the_readme_concludes_is_in_the_numbers() -> None:
    rates = {form: [study.best(row) for row in RESULTS[form]["losses"]] for form in study.FORMS}
    assert len({*rates["mup"]}) == 1
    assert rates["standard"] == sorted(rates["standard"], reverse=True)
    place = study.RATES.index(rates["mup"][0])
    widest = {form: RESULTS[form]["losses"][-1] for form in study.FORMS}
    assert f"{widest['standard'][place]:.2f} without µP and of {widest['mup'][place]:.2f} with it" in TEXT
    assert f"best rate it has {min(widest['standard']):.2f} without" in TEXT
