def needs_building(config):
    return False


def build_on_first_use(config, peers):
    return config
