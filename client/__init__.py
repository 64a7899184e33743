"""The data-holding site: local training under the site's own policy."""
