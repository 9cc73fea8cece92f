'use strict';

const DATA = JSON.parse(document.getElementById('data').textContent);
const SVG = 'http://www.w3.org/2000/svg';

const byId = (id) => document.getElementById(id);

function add(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === 'text') node.textContent = value;
    else if (name === 'class') node.setAttribute('class', value);
    else if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) {
      node.setAttribute(name, value === true ? '' : value);
    }
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// File names and classes reach the page only as text nodes and attributes.
const el = (tag, properties = {}, ...children) =>
  add(document.createElement(tag), properties, children);
const svg = (tag, properties = {}, ...children) =>
  add(document.createElementNS(SVG, tag), properties, children);

function factList(entries) {
  const list = el('dl', { class: 'facts' });
  for (const [name, value] of entries) {
    if (value === null || value === undefined || value === '') continue;
    list.append(el('dt', { text: name }), el('dd', { text: value }));
  }
  return list;
}
