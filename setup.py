"Packaging, read from settings.ini."
from configparser import ConfigParser
from setuptools import find_namespace_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
readme = open('README.md', encoding='utf-8').read()
for folder, view in dict(nbs='blob', results='raw').items():  # PyPI shows the README alone
    readme = readme.replace(f']({folder}/', f"]({cfg['git_url']}/{view}/main/{folder}/")

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=readme, long_description_content_type='text/markdown',
    packages=find_namespace_packages(include=['genrobust*']), package_data={'genrobust': ['py.typed'], 'genrobust.pretrained': ['*.safetensors']},
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'bench', 'hub')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research']
                + [f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 15)],
)
