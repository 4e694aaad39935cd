"""The README says of each family what the tests run."""

from spacetime_edit.tools import family_table


def test_the_readme_holds_the_table_of_the_families():
    made = f"{family_table.BEGIN}\n{family_table.table()}\n{family_table.END}"
    assert made in family_table.README.read_text(encoding="utf-8"), "run python tools/family_table.py --write"
