"""What several test files share: cases and gates of attention, trainings, builds. Test files import from here alone."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
