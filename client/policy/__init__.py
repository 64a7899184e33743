"""What the site accepts: rules, approvals, refusals."""
