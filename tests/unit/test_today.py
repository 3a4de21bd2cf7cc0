"""What the day's counters say of each model."""

from broker.today import Today, by_model


def test_counters_are_summed_up_by_model() -> None:
    """Tokens over callers, under the model that served; first tokens under the model that was asked for."""
    usage = {
        "tokens_in:ann:big:false": 100,
        "tokens_in:ann:big:true": 900,
        "tokens_in:ci:big:false": 50,
        "tokens_in:ci:small:true": 7,
        "tokens_out:ann:big": 3,
        "first_token:big:asked": 6,
        "first_token:big:other": 3,
        "first_token:big:late": 2,
        "first_token:big:none": 1,
        "ended:big:done": 12,
        "of_another:version": 5,
    }
    assert by_model(usage) == {
        "big": Today(prompt_tokens=1_050, cached_tokens=900, judged=12, in_time_asked=6, in_time_any=9),
        "small": Today(prompt_tokens=7, cached_tokens=7),
    }
    assert by_model({}) == {}
