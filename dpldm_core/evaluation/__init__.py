"""Internal measurements of a release. Says which inputs are private."""
