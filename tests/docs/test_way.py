"""The documentation's way of a datum is the way that it goes."""

import sys
import threading
from pathlib import Path

import mintjax
from docs.built_page import WALK
from mintjax import local, objectives

ROOT = Path(mintjax.__file__).parent


def test_the_functions_are_called_in_that_order():
    wanted = {(str(ROOT / path), name) for path, name, _ in WALK}
    met: dict[tuple[str, str], None] = {}

    def watch(frame, event, _):
        call = frame.f_code.co_filename, frame.f_code.co_qualname
        is_wanted = event == "call" and call in wanted
        if is_wanted and threading.current_thread().name != "mintjax-trainer":  # it has losses too
            met.setdefault(call)

    data = [mintjax.datum([1, 2], answer) for answer in ([3], [4, 5])]
    threading.setprofile(watch)  # of the client's threads, which start within
    sys.setprofile(watch)
    try:
        with local.scripted_trainer() as (service, _):
            model = service.create_lora_training_client("mintjax/nano", rank=1)
            met.clear()  # of what made the model
            model.forward_backward_custom(data, objectives.bradley_terry()).result()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    found = [(Path(path).relative_to(ROOT).as_posix(), name) for path, name in met]
    assert found == [(path, name) for path, name, _ in WALK]
