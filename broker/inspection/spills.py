"""Why a job entered another lane than the one it asked for, as a sentence. Pure."""

from broker.downgrades import STICKY
from broker.errors import CallerShare, ContextTooLong, LaneFull, ModelUnavailable, TrustZoneRefused, WrongEndpoint
from broker.records import JobRecord

WHY = {
    LaneFull.code: "{asked} had no place",
    CallerShare.code: "{caller} had its share of the places of {asked}",
    ModelUnavailable.code: "{model} could not serve then",
    ContextTooLong.code: "{model} has too little context for it",
    WrongEndpoint.code: "{model} does not do what it asks for",
    TrustZoneRefused.code: "it may not leave by {asked}",
    STICKY: "its session left {model} lately and stays there",
}


def spill(job: JobRecord) -> str:
    """Says where it was let in and why there. After a move its record does not know the lane any more."""
    where = "let into a fallback lane" if job.promotions else f"let into lane {job.lane}"
    names = {"asked": job.asked or job.asked_model, "caller": job.caller, "model": job.asked_model or job.asked}
    why = WHY.get(job.spilled, "{asked} did not take it").format(**names)
    return f"{where} at once: {why} ({job.spilled})"
