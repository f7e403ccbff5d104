import subprocess
import sys

import pytest
from peft import mapping

from diablo_theory.tuner import DiaBloConfig, DiaBloModel
from diablo_theory.tuner.registration import DiaBloPeftType, register


def test_peft_knows_diablo_by_its_string():
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["DIABLO"] is DiaBloConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["DIABLO"] is DiaBloModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["DIABLO"] == "diablo_"


def test_registering_again_changes_nothing():
    before = dict(mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    register(DiaBloConfig, DiaBloModel)
    assert before == mapping.PEFT_TYPE_TO_TUNER_MAPPING


def test_a_taken_name_is_refused_and_nothing_is_entered(monkeypatch):
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_TUNER_MAPPING, DiaBloPeftType.DIABLO, dict)
    before = dict(mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    with pytest.raises(RuntimeError, match=r"peft already has a tuner named 'DIABLO' \(<class 'dict'>\)"):
        register(DiaBloConfig, DiaBloModel)
    assert before == mapping.PEFT_TYPE_TO_CONFIG_MAPPING


def test_the_short_import_registers_and_the_bare_package_stays_light():
    code = (
        "import sys, diablo_theory; assert 'torch' not in sys.modules\n"
        "from diablo_theory import DiaBloConfig\n"
        "from peft import mapping; assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING['DIABLO'] is DiaBloConfig\n"
        "try: diablo_theory.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
